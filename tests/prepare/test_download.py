"""Whole downloads: every row with its outcome, killed and taken up again, in slices, to other places."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from servers import Server, loopback, loopback_server  # noqa: F401 - a fixture

from llava_simplified.data.images import decode_image, read_image_bytes
from llava_simplified.data.records import open_records
from llava_simplified.prepare.download import (
    Progress,
    ShardSpec,
    Store,
    download,
    fetch_shard,
    main,
    merge_main,
    merge_manifests,
    plan_shards,
    read_journal,
)
from llava_simplified.prepare.fetch import KINDS, FetchOptions
from llava_simplified.prepare.sources import Columns

OPEN = FetchOptions(
    allow_private=True, timeout=20, retries=0
)  # nothing hangs here: a busy machine is no fault
FAST = {kind: share for kind, share in loopback.MIX.items() if kind not in ("hang", "drip")}


def source(
    folder: Path, port: int, count: int = 120, mix: dict[str, int] = FAST
) -> tuple[Path, list]:
    jobs = [(url, kind, n) for url, kind, n in loopback.urls(count, port, mix=mix)]
    path = folder / "train.tsv"
    path.write_text("".join(f"caption {number}\t{url}\n" for url, _, number in jobs))
    return path, jobs


def manifest(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "manifest.parquet").to_pylist()


def check(output: Path, jobs: list) -> None:
    """Every row there once, with the outcome that the server knows, every kept picture byte by byte."""
    rows = manifest(output)
    assert [row["url"] for row in rows] == [url for url, _, _ in jobs]
    for (url, kind, number), row in zip(jobs, rows):
        outcome, digest = loopback.expected(kind, number)
        assert ((row["error"] or "ok"), row["sha256"] or "") == (outcome, digest), (url, row)
        if digest:
            image = f"{row['index'] // 50:05d}.tar#{row['key']}"
            assert decode_image(read_image_bytes(image, output)).shape[:2] == (
                row["height"],
                row["width"],
            )
    for path in output.glob("*.tar"):
        with tarfile.open(path) as archive:
            names = archive.getnames()
        assert len(names) == len(set(names)), "no picture twice"
        assert path.read_bytes().endswith(b"\0" * 1024), "whole"


def run(tsv: Path, output: Path, options: FetchOptions = OPEN, **more: Any) -> dict[str, Any]:
    return download(str(tsv), str(output), options, **{"shard_size": 50, "workers": 2, **more})


def test_every_row_has_its_true_outcome_and_every_picture_its_place(
    server: Server, tmp_path: Path
) -> None:
    tsv, jobs = source(tmp_path, server.port)
    report = run(tsv, tmp_path / "out")
    check(tmp_path / "out", jobs)
    assert sum(report["outcomes"].values()) == len(jobs)
    records = open_records(tmp_path / "out")
    assert len(records) == report["outcomes"]["ok"]
    assert records[0].responses[0].startswith("caption ")
    assert read_image_bytes(records[0].images[0], tmp_path / "out")
    assert not list((tmp_path / "out" / "_work").iterdir()), "nothing is left behind"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http_404" in page
    assert page.count("<svg") == 3, "rate, sides and sizes are drawn"
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["outcomes"] == report["outcomes"]
    )


def test_a_second_run_asks_for_nothing_and_retry_for_what_it_names(
    server: Server, tmp_path: Path
) -> None:
    tsv, jobs = source(tmp_path, server.port)
    run(tsv, tmp_path / "out")
    first = dict(server.served)
    before = {row["key"]: row for row in manifest(tmp_path / "out")}
    run(tsv, tmp_path / "out")
    assert server.served == first
    run(tsv, tmp_path / "out", retry=("404",))
    again = {path for path in server.served if server.served[path] > first[path]}
    assert again == {f"/missing/{n}.jpg" for _, kind, n in jobs if kind == "missing"}
    check(tmp_path / "out", jobs)
    kept = [row for row in manifest(tmp_path / "out") if row["status"] == "ok"]
    assert all(row["offset"] == before[row["key"]]["offset"] for row in kept), (
        "places stay true while retrying"
    )


def test_retry_asks_for_the_failures_of_an_unfinished_shard_too(
    server: Server, tmp_path: Path
) -> None:
    tsv, jobs = source(tmp_path, server.port, 4, {"ok": 1})
    settings = {
        "source": str(tsv),
        "files": False,
        "shard_size": 50,
        "limit": 0,
        "resize": 0,
        "bytes": tsv.stat().st_size,
    }
    store = Store(str(tmp_path / "out"))
    plan_shards(str(tsv), Columns(), store, settings, "")
    failed = {
        "index": 2,
        "key": "000000002",
        "error": "timeout",
        "status": "failed",
        "file": None,
        "offset": None,
    }
    (store.work / "00000.journal").write_text(
        json.dumps({**failed, "length": None}) + "\n"
    )  # a run was killed here
    assert run(tsv, tmp_path / "out", retry=("timeout",))["outcomes"] == {"ok": 4}
    check(tmp_path / "out", jobs)


def test_what_was_missing_can_come_later(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    urls = [server.url(f"redirect/{i}", "127.0.0.2") for i in range(6)]
    path.write_text("".join(f"caption\t{url}\n" for url in urls))
    server.targets.update(
        {str(i): server.url("broken/1.jpg" if i % 2 else "ok/1.jpg") for i in range(6)}
    )
    assert run(path, tmp_path / "out")["outcomes"] == {"ok": 3, "http_500": 3}
    server.targets.update({str(i): server.url(f"ok/{i}.jpg") for i in range(6)})
    assert run(path, tmp_path / "out", retry=("5xx",))["outcomes"] == {"ok": 6}
    check(tmp_path / "out", [(url, "ok", int(url[-1]) if int(url[-1]) % 2 else 1) for url in urls])


def test_a_shard_of_failures_alone_is_tried_again(server: Server, tmp_path: Path) -> None:
    tsv, jobs = source(tmp_path, server.port, 4, {"ok": 100})
    assert run(tsv, tmp_path / "out", FetchOptions(retries=0))["outcomes"] == {"blocked_address": 4}
    assert run(tsv, tmp_path / "out", retry=("blocked_address",))["outcomes"] == {"ok": 4}
    check(tmp_path / "out", jobs)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_plain_files_and_the_tutorials_json(server: Server, tmp_path: Path, scheme: str) -> None:
    tsv, jobs = source(tmp_path, server.port, 60)
    download(str(tsv), f"{scheme}{tmp_path / 'out'}", OPEN, files=True, shard_size=50, workers=2)
    records = json.loads((tmp_path / "out" / "records.json").read_text())
    assert len(records) == sum(loopback.EXPECTED[kind] == "ok" for _, kind, _ in jobs)
    for record in records:
        index = int(Path(record["image"]).name.split("_")[0])
        data = (tmp_path / "out" / record["image"]).read_bytes()
        kind = "ok" if jobs[index][1] == "moved" else jobs[index][1]
        assert data == loopback.body_of(kind, jobs[index][2])
        assert record["response"] == f"caption {index}"
    suffixes = {path.suffix for path in (tmp_path / "out" / "images").iterdir()}
    assert suffixes >= {".jpg"}
    assert not suffixes - {".jpg", ".png", ".webp"}


def test_shrinking_makes_the_shorter_side_256_and_never_grows(
    server: Server, tmp_path: Path
) -> None:
    tsv, _ = source(tmp_path, server.port, 40, {"ok": 3, "png": 1})
    run(tsv, tmp_path / "out", FetchOptions(allow_private=True, resize=256))
    for row in manifest(tmp_path / "out"):
        original = decode_image(
            loopback.body_of("ok" if "/ok/" in row["url"] else "png", row["index"])
        )
        assert min(row["width"], row["height"]) == min(256, *original.shape[:2])
        assert row["width"] / row["height"] == pytest.approx(
            original.shape[1] / original.shape[0], rel=0.01
        )


def test_several_captions_of_one_url_are_one_request(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("".join(f"caption {i}\t{server.url(f'ok/{i % 3}.jpg')}\n" for i in range(9)))
    run(path, tmp_path / "out")
    assert set(server.served.values()) == {1}
    assert open_records(tmp_path / "out")[1].responses == ("caption 1", "caption 4", "caption 7")


def test_slices_and_their_merging(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tsv, jobs = source(tmp_path, server.port, 160)
    (tmp_path / "out" / "_work").mkdir(parents=True)
    (tmp_path / "out" / "_work" / "00002.journal").write_text(
        '{"index": 100, "error": "dns"}\n'
    )  # another job's
    assert sum(run(tsv, tmp_path / "out", shards="1/2")["outcomes"].values()) == 60
    (tmp_path / "out" / "_work" / "00002.journal").unlink()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        "00001.tar",
        "00003.tar",
    ]
    assert merge_main([str(tmp_path / "out")]) == 1, "unfinished"
    assert "2 shards are not finished yet" in capsys.readouterr().out
    run(tsv, tmp_path / "out", shards="0/2")
    assert merge_main([str(tmp_path / "out")]) == 0
    check(tmp_path / "out", jobs)


def test_the_jobs_of_an_array_plan_at_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one publishes its plan between this one's writing and publishing."""
    (tmp_path / "x.tsv").write_text("a cat\thttp://127.0.0.1/1.jpg\n")
    settings = {
        "source": "x.tsv",
        "files": False,
        "shard_size": 50,
        "limit": 0,
        "resize": 0,
        "bytes": 0,
    }
    store, publish = Store(str(tmp_path / "out")), Store.publish

    def meanwhile(self: Store, local: Path) -> None:
        monkeypatch.setattr(Store, "publish", publish)
        plan_shards(str(tmp_path / "x.tsv"), Columns(), store, settings, "")
        publish(self, local)

    monkeypatch.setattr(Store, "publish", meanwhile)
    plan_shards(str(tmp_path / "x.tsv"), Columns(), store, settings, "")
    assert store.settings()["rows"] == 1


def test_another_source_or_size_for_the_same_output_is_refused(
    server: Server, tmp_path: Path
) -> None:
    tsv, _ = source(tmp_path, server.port, 20)
    run(tsv, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"was begun with {'shard_size': 50}, not {'shard_size': 60}"
    ):
        run(tsv, tmp_path / "out", shard_size=60)
    size = tsv.stat().st_size
    tsv.write_text(
        tsv.read_text() + "one more\thttp://127.0.0.1/1.jpg\n"
    )  # it would never be fetched
    with pytest.raises(ValueError, match=f"was begun with {{'bytes': {size}}}"):
        run(tsv, tmp_path / "out")


def test_what_would_fetch_nothing_is_refused(tmp_path: Path) -> None:
    for more in (
        {"options": replace(OPEN, per_host=0)},
        {"options": replace(OPEN, concurrency=0)},
        {"limit": -1},
    ):
        with pytest.raises(ValueError, match="at least 1"):
            run(tmp_path / "x.tsv", tmp_path / "out", **more)


def test_if_the_first_500_fail_the_same_way_the_run_stops_and_says_why(
    tmp_path: Path, server: Server
) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("".join(f"caption\t{server.url(f'ok/{i}.jpg')}\n" for i in range(40_000)))
    with pytest.raises(
        ValueError, match=r"first \d+ rows all failed with 'blocked_address'.*--allow-private"
    ):
        run(path, tmp_path / "out", FetchOptions(), shard_size=20_000)
    assert not server.served


def test_where_nothing_came_it_says_why_and_how_to_ask_again(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.tsv").write_text(f"caption\t{server.url('ok/1.jpg')}\n")
    words = [str(tmp_path / "x.tsv"), "--output", str(tmp_path / "out")]
    assert main(words) == 1
    assert "--allow-private. Then ask again with --retry blocked_address" in capsys.readouterr().err
    assert main([*words, "--allow-private", "--retry", "blocked_address"]) == 0


@pytest.mark.parametrize("kind", ["404,tiemout", "http_5xx", "4"])
def test_a_failure_that_nobody_knows_is_not_asked_for_again(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"--retry {kind.split(',')[-1]}: failures are called 404, 5xx, bad_url, .*timeout",
    ):
        run(tmp_path / "x.tsv", tmp_path / "out", retry=tuple(kind.split(",")))
    assert not (tmp_path / "out").exists()
    assert {kind for kind in loopback.EXPECTED.values() if not kind.startswith("http_")} <= {
        "ok",
        *KINDS,
    }


def test_nothing_to_merge_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("wrong", "empty"):
        with pytest.raises(ValueError, match=f"{place}: no finished shard"):
            merge_manifests(str(tmp_path / place))
    assert not (tmp_path / "wrong").exists()


def test_the_live_line_counts_what_this_run_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of an earlier run are done, but say nothing of the speed; a line that is half written is no row yet."""

    def write(shard: int, text: str) -> None:
        with (tmp_path / f"{shard:05d}.journal").open("a") as file:
            file.write(text)

    def line() -> str:
        progress.tick()
        return capsys.readouterr().err.strip("\r ")

    def row(index: int, error: str | None = None) -> str:
        return json.dumps({"index": index, "error": error}) + "\n"

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    write(0, "".join(map(row, range(1000))))
    progress = Progress(tmp_path, range(5), {3}, 100_000, True)
    now[0] += 10
    write(0, row(1000) + row(1001, "html") + row(1002)[:9])
    write(1, row(2000, "timeout"))
    assert line() == "1,003 of 100,000 rows, 0/s, 1,001 good, 2 bad, 91:39:50 left"
    write(0, row(1002)[9:])
    write(1, "".join(row(2001 + i) for i in range(96)))
    assert line() == "1,100 of 100,000 rows, 10/s, 1,098 good, 2 bad, 2:44:50 left"
    (tmp_path / "00001.journal").unlink()
    progress.finished(1, {"ok": 96, "timeout": 1})
    assert line() == "1,100 of 100,000 rows, 10/s, 1,098 good, 2 bad, 2:44:50 left"
    progress.finished(
        3, {"ok": 2000}
    )  # it was there before: what a second of this run does is still the same
    assert line() == "3,100 of 100,000 rows, 10/s, 3,098 good, 2 bad, 2:41:30 left"
    Progress(tmp_path, range(5), set(), 100_000, False).tick()
    assert not capsys.readouterr().err, "a pipe gets no line"


def test_as_many_connections_as_asked_for_can_be_opened(server: Server, tmp_path: Path) -> None:
    """Where the shell's limit on open files is low, it is raised; where it can't be, nothing is blamed on the servers."""
    tsv, _ = source(tmp_path, server.port, 300, {"ok": 1})
    for hard, said in ((2000, "300 ok"), (200, "the limit is 200 (ulimit -Hn)")):
        command = f"ulimit -Sn 100; ulimit -Hn {hard}; exec {sys.executable} -m llava_simplified.cli download {tsv} \
            --output {tmp_path / str(hard)} --allow-private --workers 1 --retries 0 --timeout 60"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert said in done.stdout + done.stderr


def test_a_row_without_a_url_is_an_outcome_wherever_it_stands(
    server: Server, tmp_path: Path
) -> None:
    """Also where it is all of a shard."""
    (tmp_path / "x.tsv").write_text(
        "".join(f"a\t{url}\n" for url in (*map(server.url, ("ok/1.jpg", "ok/2.jpg")), ""))
    )
    assert run(tmp_path / "x.tsv", tmp_path / "out", shard_size=1)["outcomes"] == {
        "ok": 2,
        "bad_url": 1,
    }


def test_a_source_without_urls_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"image": "1.jpg", "caption": "a"}]')
    with pytest.raises(ValueError, match="no URL in the first 1 rows"):
        run(tmp_path / "x.json", tmp_path / "out")


def test_any_place_that_fsspec_can_write(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tsv, jobs = source(tmp_path, server.port, 40)
    store = Store("memory://bucket/cc3m")
    settings = {
        "source": str(tsv),
        "files": False,
        "shard_size": 50,
        "limit": 0,
        "resize": 0,
        "bytes": 0,
    }
    plan_shards(str(tsv), Columns(), store, settings, "")
    fetch_shard(ShardSpec(0, "memory://bucket/cc3m", False, (), OPEN))
    report = merge_manifests("memory://bucket/cc3m")
    assert sum(report["outcomes"].values()) == len(jobs)
    names = {name.rsplit("/", 1)[-1] for name in store.fs.ls(store.root, detail=False)}
    assert names == {"00000.tar", "00000.parquet", "manifest.parquet", "download.json", "records.jsonl",
                     "report.json", "report.html"}  # fmt: skip
    store.fs.get(store.root, str(tmp_path / "copy"), recursive=True)
    check(tmp_path / "copy", jobs)


def test_what_other_processes_have_written_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems of buckets remember what a folder held when it was last listed."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered: dict[str, list] = {}
    ls = MemoryFileSystem.ls
    monkeypatch.setattr(
        MemoryFileSystem,
        "ls",
        lambda fs, path, **more: remembered.setdefault(path, ls(fs, path, **more)),
    )
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda *_: remembered.clear())
    assert Store("memory://other").manifests() == []
    MemoryFileSystem().pipe_file("/other/00000.parquet", b"x")
    assert Store("memory://other").manifests() == ["00000.parquet"]


def test_two_buckets_of_one_path_have_two_work_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from fsspec.implementations.memory import MemoryFileSystem

    class Other(MemoryFileSystem):
        protocol = "other"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace("other://", "memory://"))

    fsspec.register_implementation("other", Other, clobber=True)
    assert Store("memory://bucket/cc3m").work != Store("other://bucket/cc3m").work


def test_a_torn_journal_line_is_cut_and_a_lost_picture_fetched_again(tmp_path: Path) -> None:
    journal = tmp_path / "00000.journal"
    rows = [
        {
            "index": 0,
            "status": "ok",
            "file": "0.jpg",
            "offset": 512,
            "length": 100,
            "end": 2048,
            "error": None,
        },
        {
            "index": 1,
            "status": "failed",
            "file": None,
            "offset": None,
            "length": None,
            "end": 0,
            "error": "dns",
        },
        {
            "index": 2,
            "status": "ok",
            "file": "2.jpg",
            "offset": 2560,
            "length": 100,
            "end": 4096,
            "error": None,
        },
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    journal.write_text(text + '{"index": 3, "sta')
    outcomes, end = read_journal(journal, 4096)
    assert (sorted(outcomes), end) == ([0, 1, 2], 4096)
    assert journal.read_text() == text
    outcomes, end = read_journal(journal, 3000)  # the disk lost the end of the tar
    assert (sorted(outcomes), end) == ([0, 1], 2048)


@pytest.mark.parametrize("step", ["publish tar", "publish manifest", "unlink"])
def test_a_shard_killed_while_it_is_finished(
    server: Server, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last row and the end there are three moments; after each, everything is there and nothing twice."""
    tsv, jobs = source(tmp_path, server.port, 40)
    store = Store(str(tmp_path / "out"))
    settings = {
        "source": str(tsv),
        "files": False,
        "shard_size": 50,
        "limit": 0,
        "resize": 0,
        "bytes": 0,
    }
    plan_shards(str(tsv), Columns(), store, settings, "")
    spec = ShardSpec(0, str(tmp_path / "out"), False, (), OPEN)
    publish = Store.publish

    def dies(self: Store, local: Path) -> None:
        if step == "publish tar" and local.name == "00000.tar.part":
            raise KeyboardInterrupt
        if step == "publish manifest" and local.name == "00000.parquet.part":
            raise KeyboardInterrupt
        publish(self, local)
        if step == "unlink" and local.name == "00000.parquet.part":
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "publish", dies)
    with pytest.raises(KeyboardInterrupt):
        fetch_shard(spec)
    monkeypatch.undo()
    fetch_shard(spec)
    merge_manifests(str(tmp_path / "out"))
    check(tmp_path / "out", jobs)
    assert set(server.served.values()) == {1} or max(server.served.values()) <= 2, server.served
    assert Counter(server.served)[f"/ok/{next(n for _, k, n in jobs if k == 'ok')}.jpg"] == 1


@pytest.mark.slow
def test_killed_five_times_at_random_no_row_is_lost_or_fetched_twice(tmp_path: Path) -> None:
    """kill -9 of the whole process group: after the last run every row is there, and what had a line in a journal
    when the run was killed was not asked for again."""
    rng = random.Random(7)
    with loopback.running(0.05) as port:
        tsv, jobs = source(tmp_path, port, 2600)
        output = tmp_path / "out"
        command = [sys.executable, "-m", "llava_simplified.cli", "download", str(tsv), "--output", str(output),
                   "--shard-size", "50", "--workers", "2", "--timeout", "20", "--allow-private", "--retries", "0",
                   "--concurrency", "8"]  # fmt: skip
        recorded: dict[int, float] = {}
        kills = 0
        while kills < 5:
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
            time.sleep(1.2 + 0.8 * rng.random())
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL) if kills % 2 else process.kill()
            process.wait()
            time.sleep(1.5)  # its workers see that it is gone
            kills += 1
            seen = _recorded(output)
            assert all(seen.get(index) == at for index, at in recorded.items()), (
                "a recorded row was fetched again"
            )
            recorded = seen
        assert kills == 5, "the run was over too soon for this test to mean anything"
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        check(output, jobs)
        final = {row["index"]: row["at"] for row in manifest(output)}
        assert all(final[index] == at for index, at in recorded.items())


def _recorded(output: Path) -> dict[int, float]:
    """When each row that a journal or a manifest holds was fetched."""
    found = {}
    for path in output.glob("0*.parquet"):
        found.update({row["index"]: row["at"] for row in pq.read_table(path).to_pylist()})
    for path in (output / "_work").glob("*.journal"):
        data = path.read_bytes()
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            row = json.loads(line)
            found[row["index"]] = row["at"]
    return found


@pytest.mark.slow
def test_ray_fetches_the_same(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the ray extra is not installed")
    tsv, jobs = source(tmp_path, server.port)
    run(tsv, tmp_path / "out", engine="ray")
    check(tmp_path / "out", jobs)
