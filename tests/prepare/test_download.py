"""Complete downloads: the outcome of every row, resuming, slices, and other file systems."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_process import ForkedProcess
from downloads import SHARD_SIZE, check_output, read_manifest, write_source
from fsspec.implementations.memory import MemoryFileSystem
from servers import Server, loopback, loopback_server  # noqa: F401 - a fixture

from llava_simplified import jobs
from llava_simplified.data.images import MAX_PIXELS, decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.jobs import Journal, exclusive_lock
from llava_simplified.prepare import download_progress, download_shard
from llava_simplified.prepare.convert import convert
from llava_simplified.prepare.download import download, merge_manifests, plan_shards
from llava_simplified.prepare.download_command import main, merge_main
from llava_simplified.prepare.download_progress import FAIL_FAST_AFTER, DownloadProgress
from llava_simplified.prepare.download_shard import ShardSpec, fetch_shard, finished_rows
from llava_simplified.prepare.download_store import Store
from llava_simplified.prepare.fetch_options import FAILURE_KINDS, FetchOptions
from llava_simplified.prepare.source_rows import Columns

# No request hangs in these tests. A long timeout prevents failures on a busy machine.
OPEN = FetchOptions(allow_private=True, timeout=20, retries=0)


def run(tsv: Path, output: Path, options: FetchOptions = OPEN, **more: Any) -> dict[str, Any]:
    """Download with small shards, in one worker process: starting another one takes longer than fetching a shard."""
    return download(
        str(tsv), str(output), options, **{"shard_size": SHARD_SIZE, "workers": 1, **more}
    )


def settings_of(source: Path, size: int = 0) -> dict[str, Any]:
    """Return the settings that `download` stores for a download with small shards."""
    return {
        "source": str(source),
        "files": False,
        "shard_size": SHARD_SIZE,
        "limit": 0,
        "resize": 0,
        "bytes": size,
    }


# ---- outcomes ----


@pytest.mark.medium
def test_download_records_every_outcome_and_stores_every_image(
    server: Server, tmp_path: Path
) -> None:
    tsv, url_jobs = write_source(tmp_path, server.port)
    output = tmp_path / "out"
    report = run(tsv, output, workers=2)
    check_output(output, url_jobs)
    assert sum(report["outcomes"].values()) == len(url_jobs)
    records = open_records(output)
    assert len(records) == report["outcomes"]["ok"]
    assert records[0].responses[0].startswith("caption ")
    assert read_image_bytes(records[0].images[0], output)
    assert not list((output / "_work").iterdir()), "nothing is left behind"
    page = (output / "report.html").read_text()
    assert "http_404" in page
    assert page.count("<svg") == 3, "rate, sides and sizes are drawn"
    assert json.loads((output / "report.json").read_text())["outcomes"] == report["outcomes"]


@pytest.mark.medium
def test_download_of_several_captions_of_one_url_is_one_request(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "x.tsv"
    urls = [server.url(f"ok/{number % 3}.jpg") for number in range(9)]
    path.write_text("".join(f"caption {number}\t{url}\n" for number, url in enumerate(urls)))
    run(path, tmp_path / "out")
    assert set(server.served.values()) == {1}
    assert open_records(tmp_path / "out")[1].responses == ("caption 1", "caption 4", "caption 7")


@pytest.mark.medium
def test_download_resizes_the_shorter_side_and_never_enlarges(
    server: Server, tmp_path: Path
) -> None:
    tsv, _ = write_source(tmp_path, server.port, 40, {"ok": 3, "png": 1})
    run(tsv, tmp_path / "out", FetchOptions(allow_private=True, resize=256))
    for row in read_manifest(tmp_path / "out"):
        kind = "ok" if "/ok/" in row["url"] else "png"
        height, width, _ = decode_image(loopback.body_of(kind, row["index"])).shape
        assert min(row["width"], row["height"]) == min(256, height, width)
        assert row["width"] / row["height"] == pytest.approx(width / height, rel=0.01)


@pytest.mark.medium
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_download_to_plain_files_writes_the_records_of_the_tutorial(
    server: Server, tmp_path: Path, scheme: str
) -> None:
    tsv, url_jobs = write_source(tmp_path, server.port, 60)
    output = tmp_path / "out"
    download(str(tsv), f"{scheme}{output}", OPEN, files=True, shard_size=SHARD_SIZE, workers=1)
    records = json.loads((output / "records.json").read_text())
    assert len(records) == sum(loopback.EXPECTED[kind] == "ok" for _, kind, _ in url_jobs)
    for record in records:
        index = int(Path(record["image"]).name.split("_")[0])
        _, kind, number = url_jobs[index]
        body = loopback.body_of("ok" if kind == "moved" else kind, number)
        assert (output / record["image"]).read_bytes() == body
        assert record["response"] == f"caption {index}"
    suffixes = {path.suffix for path in (output / "images").iterdir()}
    assert suffixes >= {".jpg"}
    assert not suffixes - {".jpg", ".png", ".webp"}


@pytest.mark.medium
def test_download_of_a_list_of_urls_fetches_them_and_says_that_captions_are_missing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [server.url(f"ok/w_{number},h_2/{number}.jpg") for number in range(3)]
    (tmp_path / "urls.txt").write_text("".join(f"{url}\n" for url in urls))
    output = tmp_path / "out"
    argv = [str(tmp_path / "urls.txt"), "--output", str(output), "--allow-private"]
    assert main([*argv, "--workers", "1"]) == 0
    assert [(row["url"], row["error"]) for row in read_manifest(output)] == [
        (url, None) for url in urls
    ]
    assert (
        "3 no caption (the image is downloaded, but no record is written)"
        in capsys.readouterr().out
    )
    assert not (output / "records.jsonl").read_text()


@pytest.mark.parametrize("command", ["download", "convert"])
def test_row_without_a_caption_is_counted_once(tmp_path: Path, command: str) -> None:
    """It is counted as an image without a caption. Its empty captions are not counted in addition."""
    rows = ["0,a cat", "1,", "2,", "2,a dog", "3,", "3,", "4,"]
    source = tmp_path / "x.csv"
    source.write_text("url,caption\n" + "".join(f"http://a.example/{row}\n" for row in rows))
    if command == "convert":
        _, issues = convert(str(source), tmp_path / "o.json")
        kind = "image without any caption (skipped)"
        lines = issues.lines()
    else:
        store = Store(str(tmp_path / "o"))
        settings = settings_of(source)
        lines = plan_shards(str(source), Columns(), store, settings, "")["oddities"]
        kind = "no caption (the image is downloaded, but no record is written)"
    # Images 1, 3 and 4 have no caption. Image 2 has an empty caption and another one.
    assert [line.split(" (first")[0].strip() for line in lines] == [
        f"3 {kind}",
        "1 empty caption (skipped)",
    ]


@pytest.mark.medium
def test_download_of_any_url_finishes_its_shard(server: Server, tmp_path: Path) -> None:
    """Any text in a row or in a redirect leads to an outcome of that row, and not to an error of the shard."""
    bad = ["http://[]@/1.jpg", "http://[", "http://a:b:c/", "//", "\ufeff", "http://\u2028/", "%"]
    for number, location in enumerate(bad):
        server.targets[str(number)] = location
    urls = [*bad, *(server.url(f"redirect/{number}") for number in range(len(bad)))]
    urls.append(server.url("ok/1.jpg"))
    lines = [json.dumps({"url": url, "caption": "a cat"}) for url in urls]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    run(tmp_path / "x.jsonl", tmp_path / "out")
    rows = read_manifest(tmp_path / "out")
    assert [row["url"] for row in rows] == urls
    assert [row["error"] for row in rows[-1:]] == [None]
    assert {row["error"] for row in rows[:-1]} <= {"bad_url", "redirect", "http_404", "dns"}


@pytest.mark.medium
def test_download_of_a_source_whose_file_name_is_not_utf_8(server: Server, tmp_path: Path) -> None:
    """The name is written to the settings and the report, which must not fail if it is not UTF-8."""
    source = tmp_path / os.fsdecode(b"caf\xe9.tsv")
    source.write_text(f"a cat\t{server.url('ok/1.jpg')}\n")
    run(source, tmp_path / "out")
    run(source, tmp_path / "out")
    assert [row["error"] for row in read_manifest(tmp_path / "out")] == [None]


@pytest.mark.medium
def test_download_records_a_row_without_a_url(server: Server, tmp_path: Path) -> None:
    """The row gets an entry in the manifest, even if it is the only row of a shard."""
    urls = [server.url("ok/1.jpg"), server.url("ok/2.jpg"), ""]
    (tmp_path / "x.tsv").write_text("".join(f"a\t{url}\n" for url in urls))
    report = run(tmp_path / "x.tsv", tmp_path / "out", shard_size=1)
    assert report["outcomes"] == {"ok": 2, "bad_url": 1}


# ---- a second run ----


@pytest.mark.medium
def test_download_again_requests_nothing_and_retry_only_what_it_names(
    server: Server, tmp_path: Path
) -> None:
    tsv, url_jobs = write_source(tmp_path, server.port)
    output = tmp_path / "out"
    run(tsv, output)
    first = dict(server.served)
    before = {row["key"]: row for row in read_manifest(output)}
    run(tsv, output)
    assert server.served == first
    run(tsv, output, retry=("404",))
    again = {path for path in server.served if server.served[path] > first[path]}
    assert again == {f"/missing/{number}.jpg" for _, kind, number in url_jobs if kind == "missing"}
    check_output(output, url_jobs)
    for row in read_manifest(output):
        if row["status"] == "ok":
            assert row["offset"] == before[row["key"]]["offset"], "images keep their place"


@pytest.mark.medium
def test_download_retry_fetches_failures_of_an_unfinished_shard(
    server: Server, tmp_path: Path
) -> None:
    tsv, url_jobs = write_source(tmp_path, server.port, 4, {"ok": 1})
    store = Store(str(tmp_path / "out"))
    plan_shards(str(tsv), Columns(), store, settings_of(tsv, tsv.stat().st_size), "")
    failed = {
        "index": 2,
        "key": "000000002",
        "error": "timeout",
        "status": "failed",
        "file": None,
        "offset": None,
        "length": None,
    }
    # Simulate a run that was killed here.
    (store.work / "00000.journal").write_text(json.dumps(failed) + "\n")
    assert run(tsv, tmp_path / "out", retry=("timeout",))["outcomes"] == {"ok": 4}
    check_output(tmp_path / "out", url_jobs)


@pytest.mark.medium
def test_download_retry_adds_images_that_were_missing(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    urls = [server.url(f"redirect/{number}", "127.0.0.2") for number in range(6)]
    path.write_text("".join(f"caption\t{url}\n" for url in urls))
    for number in range(6):
        target = "broken/1.jpg" if number % 2 else "ok/1.jpg"
        server.targets[str(number)] = server.url(target)
    assert run(path, tmp_path / "out")["outcomes"] == {"ok": 3, "http_500": 3}
    server.targets.update({str(number): server.url(f"ok/{number}.jpg") for number in range(6)})
    assert run(path, tmp_path / "out", retry=("5xx",))["outcomes"] == {"ok": 6}
    images = [number if number % 2 else 1 for number in range(6)]
    check_output(tmp_path / "out", [(url, "ok", image) for url, image in zip(urls, images)])


@pytest.mark.medium
def test_download_retry_of_a_shard_with_failures_only(server: Server, tmp_path: Path) -> None:
    tsv, url_jobs = write_source(tmp_path, server.port, 4, {"ok": 100})
    refused = run(tsv, tmp_path / "out", FetchOptions(retries=0))
    assert refused["outcomes"] == {"blocked_address": 4}
    assert run(tsv, tmp_path / "out", retry=("blocked_address",))["outcomes"] == {"ok": 4}
    check_output(tmp_path / "out", url_jobs)


@pytest.mark.medium
def test_download_refuses_other_settings_for_the_same_output(
    server: Server, tmp_path: Path
) -> None:
    tsv, _ = write_source(tmp_path, server.port, 20)
    run(tsv, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out.*shard_size was 50.* 60"):
        run(tsv, tmp_path / "out", shard_size=60)
    size = tsv.stat().st_size
    # Add a row: the plan does not contain it, so it would never be fetched.
    tsv.write_text(tsv.read_text() + "one more\thttp://127.0.0.1/1.jpg\n")
    with pytest.raises(ValueError, match=f"out.*bytes was {size}"):
        run(tsv, tmp_path / "out")


@pytest.mark.medium
@pytest.mark.parametrize("pattern", ["", "*.tsv"])
def test_download_again_warns_about_files_that_were_added(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "1.tsv").write_text(f"a cat\t{server.url('ok/1.jpg')}\n" * 2)
    source = folder / pattern
    for _ in range(2):
        run(source, tmp_path / "out")
    assert not caplog.messages
    (folder / "2.tsv").write_text(f"a dog\t{server.url('ok/2.jpg')}\n" * 2)
    run(source, tmp_path / "out")
    assert "new rows are not fetched" in caplog.text
    assert len(read_manifest(tmp_path / "out")) == 1


@pytest.mark.medium
def test_download_refuses_other_columns_for_the_same_output(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"url,short,long\n{server.url('ok/1.jpg')},a cat,a cat on a mat\n")
    run(path, tmp_path / "out", columns=Columns(caption="short"))
    with pytest.raises(ValueError, match='caption_column was "short", now it is "long"'):
        run(path, tmp_path / "out", columns=Columns(caption="long"))
    with pytest.raises(ValueError, match='url_column was "", now it is "short"'):
        run(path, tmp_path / "out", columns=Columns(url="short", caption="short"))


@pytest.mark.medium
def test_download_continues_an_output_without_stored_columns(
    server: Server, tmp_path: Path
) -> None:
    """Before the columns were stored in `download.json`, most downloads used the default columns."""
    tsv, _ = write_source(tmp_path, server.port, 4, {"ok": 1})
    plan_shards(
        str(tsv),
        Columns(),
        Store(str(tmp_path / "out")),
        settings_of(tsv, tsv.stat().st_size),
        "",
    )
    with pytest.raises(ValueError, match='caption_column was "", now it is "text"'):
        run(tsv, tmp_path / "out", columns=Columns(caption="text"))
    assert run(tsv, tmp_path / "out")["outcomes"] == {"ok": 4}


@pytest.mark.medium
def test_download_is_refused_while_another_run_writes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCK_TIMEOUT", 0.2)
    tsv, url_jobs = write_source(tmp_path, server.port, 60)
    output = tmp_path / "out"
    with exclusive_lock(output / "_work" / "download.lock", "out"):
        with pytest.raises(ValueError, match="another process") as error:
            run(tsv, output)
        assert str(output) in str(error.value)
        with pytest.raises(ValueError, match="no finished shard|another process"):
            merge_manifests(str(output))
    assert not server.served
    run(tsv, output)
    check_output(output, url_jobs)
    with (
        exclusive_lock(output / "_work" / "download.lock", "out"),
        pytest.raises(ValueError, match="another process"),
    ):
        merge_manifests(str(output))
    assert not list((output / "_work").iterdir())


@pytest.mark.medium
def test_three_downloads_into_one_output_leave_one_complete_output(
    server: Server, tmp_path: Path
) -> None:
    """The commands start together. One finishes first; the others finish after it or are refused."""
    tsv, url_jobs = write_source(tmp_path, server.port, 120)
    output = tmp_path / "out"
    command = ["llava", "download", tsv, "--output", output]
    command += ["--shard-size", SHARD_SIZE, "--workers", 2]
    command += ["--allow-private", "--retries", 0, "--timeout", 20, "--quiet"]
    runs = [ForkedProcess(command) for _ in range(3)]
    statuses = [process.wait(300) for process in runs]
    assert 0 in statuses, [process.stderr for process in runs]
    for process, status in zip(runs, statuses):
        if status:
            assert "another process is writing" in process.stderr
    check_output(output, url_jobs)
    assert not [path for path in output.rglob("*") if ".part" in path.name]
    assert not list((output / "_work").iterdir())


def test_fetch_shard_is_refused_while_another_process_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOCK_TIMEOUT", 0.2)
    store = Store(str(tmp_path / "out"))
    with (
        exclusive_lock(store.work / "00003.lock", "out"),
        pytest.raises(ValueError, match=r"00003.*another process"),
    ):
        fetch_shard(ShardSpec(3, str(tmp_path / "out"), False, (), OPEN))


# ---- slices ----


@pytest.mark.medium
def test_download_in_slices_and_merge(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tsv, url_jobs = write_source(tmp_path, server.port, 160)
    output = tmp_path / "out"
    other_journal = output / "_work" / "00002.journal"  # belongs to another job
    other_journal.parent.mkdir(parents=True)
    other_journal.write_text('{"index": 100, "error": "dns"}\n')
    report = run(tsv, output, shards="1/2")
    assert sum(report["outcomes"].values()) == 60
    other_journal.unlink()
    assert sorted(path.name for path in output.glob("*.tar")) == ["00001.tar", "00003.tar"]
    assert merge_main([str(output)]) == 1, "unfinished"
    assert "2 shards are not finished yet" in capsys.readouterr().out
    run(tsv, output, shards="0/2")
    assert merge_main([str(output)]) == 0
    check_output(output, url_jobs)


def test_download_of_a_slice_without_shards_is_not_an_error(server: Server, tmp_path: Path) -> None:
    tsv, _ = write_source(tmp_path, server.port, 4, {"ok": 1})
    argv = [str(tsv), "--output", str(tmp_path / "out"), "--allow-private", "--shards", "5/8"]
    assert main(argv) == 0


def test_plan_shards_by_two_jobs_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job publishes a plan after this job has written its own plan, but before this job publishes it."""
    source = tmp_path / "x.tsv"
    source.write_text("a cat\thttp://127.0.0.1/1.jpg\n")
    settings = settings_of(source)
    store = Store(str(tmp_path / "out"))
    publish = Store.publish

    def publish_after_the_other(self: Store, local: Path, name: str) -> None:
        monkeypatch.setattr(Store, "publish", publish)
        plan_shards(str(source), Columns(), store, settings, "")
        publish(self, local, name)

    monkeypatch.setattr(Store, "publish", publish_after_the_other)
    plan_shards(str(source), Columns(), store, settings, "")
    plan = store.settings()
    assert plan is not None
    assert plan["rows"] == 1


def test_merge_manifests_without_a_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("wrong", "empty"):
        with pytest.raises(ValueError, match=f"{name}: .*no finished shard"):
            merge_manifests(str(tmp_path / name))
    assert not (tmp_path / "wrong").exists()


# ---- arguments and errors ----


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--per-host", {"options": replace(OPEN, per_host=0)}),
        ("--concurrency", {"options": replace(OPEN, concurrency=0)}),
        ("--max-bytes", {"options": replace(OPEN, max_bytes=0)}),
        ("--max-pixels", {"options": replace(OPEN, max_pixels=0)}),
        ("--resize", {"options": replace(OPEN, resize=-224)}),
        ("--retries", {"options": replace(OPEN, retries=-1)}),
        ("--shard-size", {"shard_size": 0}),
        ("--limit", {"limit": -1}),
        ("--workers", {"workers": -1}),
    ],
)
def test_download_refuses_numbers_that_are_too_small(
    tmp_path: Path, option: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{option} .*at least 1"):
        run(tmp_path / "x.tsv", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_download_refuses_a_timeout_that_ends_every_request(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="--timeout .*above 0"):
        run(tmp_path / "x.tsv", tmp_path / "out", replace(OPEN, timeout=seconds))
    assert not (tmp_path / "out").exists()


def test_download_refuses_a_contact_that_cannot_be_in_a_header(tmp_path: Path) -> None:
    """Otherwise every URL would be recorded as bad."""
    with pytest.raises(ValueError, match="--user-agent-contact 'me.*line breaks"):
        run(tmp_path / "x.tsv", tmp_path / "out", replace(OPEN, contact="me@a.example\n"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kinds", ["404,tiemout", "http_5xx", "4"])
def test_download_refuses_to_retry_an_unknown_failure(tmp_path: Path, kinds: str) -> None:
    unknown = kinds.split(",")[-1]
    with pytest.raises(ValueError, match=f"--retry {unknown}: .*404.*5xx.*bad_url, .*timeout"):
        run(tmp_path / "x.tsv", tmp_path / "out", retry=tuple(kinds.split(",")))
    assert not (tmp_path / "out").exists()


def test_failure_kinds_contain_every_outcome_of_the_server() -> None:
    outcomes = {kind for kind in loopback.EXPECTED.values() if not kind.startswith("http_")}
    assert outcomes <= {"ok", *FAILURE_KINDS}


def test_fetch_options_default_to_the_pixel_limit_of_training() -> None:
    assert FetchOptions().max_pixels == MAX_PIXELS


@pytest.mark.medium
def test_download_stops_when_the_first_rows_fail_in_the_same_way(
    tmp_path: Path, server: Server
) -> None:
    """The rows of the first shard are checked before the third is fetched, or earlier on a slow machine."""
    path = tmp_path / "x.tsv"
    urls = [server.url(f"ok/{number}.jpg") for number in range(3 * FAIL_FAST_AFTER)]
    path.write_text("".join(f"caption\t{url}\n" for url in urls))
    with pytest.raises(
        ValueError, match=r"first \d+ rows all failed with 'blocked_address'.*--allow-private"
    ):
        run(path, tmp_path / "out", FetchOptions(), shard_size=FAIL_FAST_AFTER)
    assert not server.served
    assert not (tmp_path / "out" / "00002.tar").exists()


def test_download_progress_stops_when_the_first_rows_of_a_shard_fail_in_the_same_way(
    tmp_path: Path,
) -> None:
    progress = DownloadProgress(tmp_path, range(1), set(), 10**6, False)
    line = json.dumps({"index": 0, "error": "blocked_address"}) + "\n"
    journal = tmp_path / "00000.journal"
    journal.write_text(line * (FAIL_FAST_AFTER - 1))
    progress.tick()
    journal.write_text(line * FAIL_FAST_AFTER)
    with pytest.raises(
        ValueError, match=f"first {FAIL_FAST_AFTER} rows all failed.*--retry blocked_address"
    ):
        progress.tick()


def test_download_progress_does_not_advise_to_retry_wrong_urls(tmp_path: Path) -> None:
    progress = DownloadProgress(tmp_path, range(1), set(), 10**6, False)
    line = json.dumps({"index": 0, "error": "bad_url"}) + "\n"
    (tmp_path / "00000.journal").write_text(line * FAIL_FAST_AFTER)
    with pytest.raises(ValueError, match="all failed with 'bad_url'.*--url-column") as error:
        progress.tick()
    assert "--retry" not in str(error.value)


@pytest.mark.parametrize("kept", ["ok", "dns"])
def test_download_progress_does_not_stop_when_retried_rows_fail_as_before(
    tmp_path: Path, kept: str
) -> None:
    """Dead links stay dead. But if there never was an image, the cause is probably on this machine."""
    error = None if kept == "ok" else kept
    kept_row = json.dumps({"index": 0, "error": error, "kept": True}) + "\n"
    failed_row = json.dumps({"index": 1, "error": "http_404"}) + "\n"
    progress = DownloadProgress(tmp_path, range(1), {0}, 10**6, False, retry=("4xx",))
    (tmp_path / "00000.journal").write_text(kept_row + failed_row * FAIL_FAST_AFTER)
    if kept == "ok":
        progress.tick()
    else:
        with pytest.raises(ValueError, match="all failed with 'http_404'"):
            progress.tick()


@pytest.mark.medium
def test_download_retry_does_not_count_the_rows_that_it_keeps(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all rows failed, the rows that are not retried say nothing about this run."""
    monkeypatch.setattr(download_progress, "FAIL_FAST_AFTER", 3)
    tsv, _ = write_source(tmp_path, server.port, 8, {"ok": 1})
    output = tmp_path / "out"
    run(tsv, output)
    manifest = pq.read_table(output / "00000.parquet")
    kinds = ["dns"] * 4 + ["timeout"] * 4
    rows = [
        {**row, "status": "failed", "error": kind, "file": None, "offset": None, "length": None}
        for row, kind in zip(manifest.to_pylist(), kinds)
    ]
    pq.write_table(pa.Table.from_pylist(rows, manifest.schema), output / "00000.parquet")
    progress = DownloadProgress(output / "_work", range(1), {0}, 8, False)
    fetch_missing = download_shard._ShardJob._fetch_missing

    def tick_and_fetch(
        job: download_shard._ShardJob, planned: list[dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        # At this point, the journal contains only the kept rows.
        progress.tick()
        return fetch_missing(job, planned)

    monkeypatch.setattr(download_shard._ShardJob, "_fetch_missing", tick_and_fetch)
    outcomes = fetch_shard(ShardSpec(0, str(output), False, ("dns",), OPEN))
    assert outcomes == {"ok": 4, "timeout": 4}
    progress.finish_shard(0, outcomes)
    assert progress.progress.initial == 4
    assert progress.progress.done == 8
    schema = pq.read_schema(output / "00000.parquet")
    assert schema.names == download_shard.MANIFEST_SCHEMA.names


@pytest.mark.medium
def test_download_command_without_any_image_says_why_and_how_to_retry(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.tsv").write_text(f"caption\t{server.url('ok/1.jpg')}\n")
    argv = [str(tmp_path / "x.tsv"), "--output", str(tmp_path / "out")]
    assert main(argv) == 1
    message = capsys.readouterr().err
    assert "--allow-private" in message
    assert "--retry blocked_address" in message
    assert main([*argv, "--allow-private", "--retry", "blocked_address"]) == 0


def test_download_of_a_source_without_urls_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"image": "1.jpg", "caption": "a"}]')
    with pytest.raises(ValueError, match="no URL in the first 1 rows"):
        run(tmp_path / "x.json", tmp_path / "out")


@pytest.mark.medium
def test_download_raises_the_limit_of_open_files_or_names_it(
    server: Server, tmp_path: Path
) -> None:
    """If the hard limit is too low, the error names it and the option that requires fewer files."""
    tsv, _ = write_source(tmp_path, server.port, 150, {"ok": 1})
    for hard_limit, expected in ((2000, ["150 ok"]), (200, ["--concurrency", "200", "ulimit -Hn"])):
        command = ["llava", "download", tsv, "--output", tmp_path / str(hard_limit)]
        command += ["--allow-private", "--workers", 1, "--retries", 0, "--timeout", 60]
        process = ForkedProcess(command, open_files=(100, hard_limit))
        process.wait(300)
        for part in expected:
            assert part in process.stdout + process.stderr


# ---- progress ----


def test_download_progress_counts_the_rows_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of an earlier run count as done, but not toward the rate. A half-written line is not counted."""

    def append(shard: int, text: str) -> None:
        with (tmp_path / f"{shard:05d}.journal").open("a") as stream:
            stream.write(text)

    def row(index: int, error: str | None = None) -> str:
        return json.dumps({"index": index, "error": error}) + "\n"

    def line() -> str:
        watch.tick()
        return watch.progress.line()

    now = [100.0]
    # Replace `time` only in `jobs`. Servers of other tests run in threads of this process, and need the real time.
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    append(0, "".join(row(index) for index in range(1000)))
    watch = DownloadProgress(tmp_path, range(5), {3}, 100_000, True)
    now[0] += 10
    append(0, row(1000) + row(1001, "html") + row(1002)[:9])
    append(1, row(2000, "timeout"))
    assert line() == "1,003 of 100,000 rows, 0.3/s, 1,001 ok, 2 failed, 91:39:50 left"
    append(0, row(1002)[9:])
    append(1, "".join(row(2001 + index) for index in range(96)))
    expected = "1,100 of 100,000 rows, 10.0/s, 1,098 ok, 2 failed, 2:44:50 left"
    assert line() == expected
    (tmp_path / "00001.journal").unlink()
    watch.finish_shard(1, {"ok": 96, "timeout": 1})
    assert line() == expected
    # Add a shard that an earlier run has finished: the rate of this run stays the same.
    watch.finish_shard(3, {"ok": 2000})
    assert line() == "3,100 of 100,000 rows, 10.0/s, 3,098 ok, 2 failed, 2:41:30 left"


def test_download_progress_can_be_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for enabled in (True, False):
        watch = DownloadProgress(tmp_path, range(5), set(), 100_000, enabled)
        now[0] += 60
        watch.tick()
        assert bool(capsys.readouterr().err) == enabled


# ---- other file systems ----


@pytest.mark.medium
def test_download_to_another_file_system(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tsv, url_jobs = write_source(tmp_path, server.port, 40)
    store = Store("memory://bucket/cc3m")
    plan_shards(str(tsv), Columns(), store, settings_of(tsv), "")
    fetch_shard(ShardSpec(0, "memory://bucket/cc3m", False, (), OPEN))
    report = merge_manifests("memory://bucket/cc3m")
    assert sum(report["outcomes"].values()) == len(url_jobs)
    names = {name.rsplit("/", 1)[-1] for name in store.fs.ls(store.root, detail=False)}
    assert names == {
        "00000.tar",
        "00000.parquet",
        "manifest.parquet",
        "download.json",
        "records.jsonl",
        "report.json",
        "report.html",
    }
    store.fs.get(store.root, str(tmp_path / "copy"), recursive=True)
    check_output(tmp_path / "copy", url_jobs)


def test_store_publish_leaves_no_temporary_copy_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store("memory://broken")
    local = store.work / "x"
    local.write_text("x")

    def fail(*_: object) -> None:
        raise OSError("no rename")

    monkeypatch.setattr(MemoryFileSystem, "mv", fail)
    with pytest.raises(OSError, match="no rename"):
        store.publish(local, "x")
    assert store.fs.ls(store.root, detail=False) == []


def test_store_finds_files_that_other_processes_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the file systems of buckets, this one caches the list of files in a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered: dict[str, list] = {}
    ls = MemoryFileSystem.ls

    def remembering_ls(fs: MemoryFileSystem, path: str, **more: Any) -> list:
        return remembered.setdefault(path, ls(fs, path, **more))

    monkeypatch.setattr(MemoryFileSystem, "ls", remembering_ls)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda *_: remembered.clear())
    assert Store("memory://other").manifests() == []
    MemoryFileSystem().pipe_file("/other/00000.parquet", b"x")
    assert Store("memory://other").manifests() == ["00000.parquet"]


def test_store_work_folder_depends_on_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Other(MemoryFileSystem):
        protocol = "other"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace("other://", "memory://"))

    fsspec.register_implementation("other", Other, clobber=True)
    assert Store("memory://bucket/cc3m").work != Store("other://bucket/cc3m").work


# ---- killed runs; see also tests/test_kill.py ----


def test_finished_rows_drops_a_torn_line_and_an_image_that_the_disk_lost(tmp_path: Path) -> None:
    path = tmp_path / "00000.journal"
    failed = {
        "index": 1,
        "status": "failed",
        "file": None,
        "offset": None,
        "length": None,
        "end": 0,
        "error": "dns",
    }
    stored = {"status": "ok", "length": 100, "error": None}
    rows = [
        {"index": 0, **stored, "file": "0.jpg", "offset": 512, "end": 2048},
        failed,
        {"index": 2, **stored, "file": "2.jpg", "offset": 2560, "end": 4096},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + '{"index": 3, "sta')
    with Journal(path) as journal:
        outcomes, end = finished_rows(journal.rows(), 4096)
        assert (sorted(outcomes), end) == ([0, 1, 2], 4096)
        assert path.read_text() == text
        # Simulate a disk that has lost the end of the tar.
        outcomes, end = finished_rows(journal.rows(), 3000)
        assert (sorted(outcomes), end) == ([0, 1], 2048)


@pytest.mark.parametrize("step", ["before tar", "before manifest", "after manifest"])
def test_fetch_shard_killed_while_it_is_published_is_finished_by_the_next_run(
    server: Server, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed at one of three steps after the last row. No row is lost, and no image is fetched again."""
    tsv, url_jobs = write_source(tmp_path, server.port, 40)
    output = tmp_path / "out"
    store = Store(str(output))
    plan_shards(str(tsv), Columns(), store, settings_of(tsv), "")
    spec = ShardSpec(0, str(output), False, (), OPEN)
    publish = Store.publish

    def publish_and_die(self: Store, local: Path, name: str) -> None:
        if step == "before tar" and name == "00000.tar":
            raise KeyboardInterrupt
        if step == "before manifest" and name == "00000.parquet":
            raise KeyboardInterrupt
        publish(self, local, name)
        if step == "after manifest" and name == "00000.parquet":
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "publish", publish_and_die)
    with pytest.raises(KeyboardInterrupt):
        fetch_shard(spec)
    monkeypatch.undo()
    fetch_shard(spec)
    merge_manifests(str(output))
    check_output(output, url_jobs)
    assert max(server.served.values()) <= 2, server.served
    first_ok = next(number for _, kind, number in url_jobs if kind == "ok")
    assert Counter(server.served)[f"/ok/{first_ok}.jpg"] == 1
