"""`llava download`: URLs -> shards. Planned once, fetched shard by shard, recorded row by row.

On its way a shard is three files in the work folder: the plan (which rows), the tar as far as it has come,
and a journal with one line per finished row, written after the row's picture is in the tar. Whatever kills
the process, the journal says what is done. After the last row the journal becomes the manifest, and tar and
manifest are renamed into the output.
"""

from __future__ import annotations

import argparse
import asyncio
import asyncio.sslproto
import fcntl
import gc
import hashlib
import io
import json
import os
import re
import resource
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from llava_simplified.data.images import MAX_PIXELS
from llava_simplified.data.shards import END_OF_ARCHIVE, ShardWriter
from llava_simplified.jobs import write_all
from llava_simplified.prepare.convert import (
    INSTRUCTION,
    RecordWriter,
    file_name,
    group_captions,
    make_record,
)
from llava_simplified.prepare.fetch import KINDS, FetchOptions, FetchResult, fetch_all
from llava_simplified.prepare.preparation_report import write_download_report
from llava_simplified.prepare.sources import Columns, ParseIssues, read_source
from llava_simplified.workers import add_worker_arguments, parse_slice, run_tasks

FAIL_FAST_AFTER = 500  # so many first failures of one kind, and no picture, stop a run
_ROW = {"index": pa.int64(), "url": pa.string(), "captions": pa.list_(pa.string())}
MANIFEST = pa.schema(
    {
        **_ROW,
        "key": pa.string(),
        "status": pa.string(),  # ok or failed
        "error": pa.string(),  # the cause: timeout, dns, http_404, html, truncated, opt_out, ...
        "detail": pa.string(),
        "http": pa.int16(),
        "sha256": pa.string(),  # of the picture as it is kept
        "bytes": pa.int64(),  # as it was received
        "width": pa.int32(),
        "height": pa.int32(),
        "file": pa.string(),
        "offset": pa.int64(),  # of the picture in the tar
        "length": pa.int32(),
        "seconds": pa.float32(),
        "at": pa.float64(),  # Unix time
    }
)
_ADVICE = {
    "dns": "no host name could be resolved. Is there a network, and a DNS server?",
    "connect": "no connection could be made. Is there a firewall, or a proxy that must be gone through?",
    "refused": "every connection was refused. Is the mirror running, is its port right?",
    "timeout": "nothing answered in time. A firewall? Else a longer --timeout or a lower --concurrency.",
    "tls": "no certificate could be verified. Does a proxy open TLS (SSL_CERT_FILE), is the clock right?",
    "blocked_address": "all addresses are private. If this is your own mirror: --allow-private.",
    "http_403": "the servers refuse. Say who you are with --user-agent-contact, lower --concurrency.",
    "http_407": "a proxy wants to be told who you are.",
    "scheme": "these are not http or https URLs. Is --url-column right?",
    "bad_url": "these are no URLs. Is --url-column right?",
}


class Store:
    """The output: a folder, or anything that fsspec can write; `work`: where unfinished shards are, a local folder."""

    def __init__(self, output: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(output)
        self.local = isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)
        self.fs.invalidate_cache()  # of listings: other processes write here too
        self.fs.makedirs(self.root, exist_ok=True)
        cache = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            / "llava_simplified"
            / "download"
        )
        place = hashlib.sha256(self.fs.unstrip_protocol(self.root).encode()).hexdigest()[:16]
        self.work = Path(self.root, "_work") if self.local else cache / place
        self.work.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> str:
        """The place of `name` in the output."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether it is there, whole."""
        return bool(self.fs.exists(self.path(name)))

    def publish(self, local: Path) -> None:
        """Move a finished file (less `.part` and what follows in its name) here; nobody ever sees half of it."""
        name, _, mine = local.name.partition(".part")
        if self.local:
            local.replace(self.path(name))
        else:
            self.fs.put_file(str(local), self.path(f"{name}.part{mine}"))
            self.fs.mv(self.path(f"{name}.part{mine}"), self.path(name))
            local.unlink()

    def fetch(self, name: str, local: Path) -> None:
        """Copy a file of the output."""
        self.fs.get_file(self.path(name), f"{local}.copy")
        Path(f"{local}.copy").replace(local)

    def settings(self) -> dict[str, Any] | None:
        """What the output was begun with."""
        name = "download.json"
        return json.loads(self.fs.cat_file(self.path(name))) if self.exists(name) else None

    def manifests(self) -> list[str]:
        """The manifests of the finished shards."""
        names = (path.rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False))
        return sorted(name for name in names if re.fullmatch(r"\d{5,}\.parquet", name))

    def read_manifest(self, name: str) -> pa.Table:
        """One of them."""
        with self.fs.open(self.path(name), "rb") as file:
            return pq.ParquetFile(file).read()


# ---- one shard


@dataclass(frozen=True)
class ShardSpec:
    """One shard to be fetched: all that a worker needs to know."""

    number: int
    output: str
    files: bool
    retry: tuple[str, ...]
    options: FetchOptions


def fetch_shard(spec: ShardSpec) -> dict[str, int]:
    """Fetch what is missing of a shard; returns how many rows had which outcome. Idempotent."""
    # a buffer that each connection holds, here as large as a TLS record; set in the process that downloads, not
    # wherever a picture is fetched
    asyncio.sslproto.SSLProtocol.max_size = 1 << 14
    gc.set_threshold(20_000, 50)  # the collector's usual pace takes a tenth of the time
    _allow_files(2 * spec.options.concurrency + 64)
    store, name = Store(spec.output), f"{spec.number:05d}"
    work = store.work
    journal, plan, tar = (work / f"{name}.{suffix}" for suffix in ("journal", "plan", "tar.part"))
    done = (
        store.read_manifest(f"{name}.parquet").to_pylist()
        if store.exists(f"{name}.parquet")
        else None
    )
    if done is not None and not journal.exists():
        kept = [row for row in done if not _matches(row["error"], spec.retry)]
        if len(kept) == len(done):
            return _count(done)
        _reopen(kept, journal, 0 if spec.files else store.fs.size(store.path(f"{name}.tar")))
    rows = [{name: row[name] for name in _ROW} for row in done or map(json.loads, plan.open())]
    with _locked(journal) as file:
        if not spec.files and not tar.exists() and store.exists(f"{name}.tar"):
            store.fetch(f"{name}.tar", tar)  # to retry, or killed between the last two renames
        outcomes, end = read_journal(
            journal, 0 if spec.files or not tar.exists() else tar.stat().st_size
        )
        outcomes = {
            index: row for index, row in outcomes.items() if not _matches(row["error"], spec.retry)
        }
        writer = None if spec.files else ShardWriter(tar, end)
        missing = [row for row in rows if row["index"] not in outcomes]
        asyncio.run(_fetch_rows(missing, spec, Path(store.root, "images"), file, writer, outcomes))
        if writer:
            writer.close()
            store.publish(tar)
        table = _manifest([{**outcomes[row["index"]], **row} for row in rows])
        pq.write_table(table, work / f"{name}.parquet.part", compression="zstd")
        store.publish(work / f"{name}.parquet.part")
        plan.unlink(missing_ok=True)
        journal.unlink()
    return _count(outcomes.values())


def _allow_files(count: int) -> None:
    """Let this process open so many: a connection is one, and what can't be opened would be called the server's fault."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    except ValueError:
        raise ValueError(
            f"--concurrency: {count} files may be open then, the limit is {hard} (ulimit -Hn)"
        ) from None


def _manifest(rows: list[dict[str, Any]]) -> pa.Table:
    """Through Arrow's JSON reader: `Table.from_pylist` imports pandas where it is, 50 MB in each worker."""
    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    options = pa.json.ReadOptions(use_threads=False, block_size=len(lines))
    return pa.json.read_json(
        io.BytesIO(lines), options, pa.json.ParseOptions(explicit_schema=MANIFEST)
    )


def _count(outcomes: Any) -> dict[str, int]:
    return Counter(outcome["error"] or "ok" for outcome in outcomes)


def _matches(error: str | None, kinds: tuple[str, ...]) -> bool:
    """`404`, `http_404`, `4xx`, `all`, or any other kind by its name."""
    if not error:
        return False
    names = {"all", error, error.removeprefix("http_")}
    return not names.isdisjoint(kinds) or (error.startswith("http_") and f"{error[5]}xx" in kinds)


def _reopen(kept: list[dict[str, Any]], journal: Path, tar_size: int) -> None:
    """Make a journal of the rows of a finished shard that are not tried again."""
    rows: list[dict[str, Any]] = [
        {k: v for k, v in row.items() if k not in ("url", "captions")} for row in kept
    ]
    if tar_size > len(END_OF_ARCHIVE):
        rows.append({"index": -1, "end": tar_size - len(END_OF_ARCHIVE)})
    journal.with_suffix(".new").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    journal.with_suffix(".new").replace(journal)


@contextmanager
def _locked(journal: Path) -> Iterator[int]:
    """The journal, open to append. One process at a time: a killed run's workers may live a moment longer."""
    file = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for wait in (0.05, 0.2, 0.5, 1, 2, 4, 0):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise ValueError(f"{journal}: another process is fetching this shard") from None
                time.sleep(wait)
        yield file
    finally:
        os.close(file)


def read_journal(journal: Path, tar_size: int) -> tuple[dict[int, dict[str, Any]], int]:
    """The finished rows by index, and the end of the last whole sample in the tar; cuts off a torn last line.

    A picture that the tar, as it is, can't hold was lost by the disk (the machine went down): its row is
    fetched again.
    """
    data = journal.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(journal, len(whole))
    outcomes, end = dict[int, dict[str, Any]](), 0
    for outcome in map(json.loads, whole.splitlines()):
        reach = outcome.pop("end", 0) or (outcome["offset"] or 0) + (outcome["length"] or 0)
        if outcome.get("file") is None or not outcome.get("offset") or reach <= tar_size:
            outcomes[outcome["index"]] = outcome
            end = max(end, min(reach, tar_size))
    outcomes.pop(-1, None)
    return outcomes, end


async def _fetch_rows(
    rows: list[dict[str, Any]],
    spec: ShardSpec,
    folder: Path,
    journal: int,
    writer: ShardWriter | None,
    outcomes: dict[int, dict[str, Any]],
) -> None:
    """Fetch rows; keep each picture, then write its line in the journal."""
    captions = {row["index"]: tuple(row["captions"]) for row in rows}
    async for index, url, fetched in fetch_all(
        ((row["index"], row["url"]) for row in rows), spec.options
    ):
        outcome = outcomes[index] = _outcome(index, fetched)
        end = 0
        if fetched.picture is not None:
            data, suffix = fetched.picture.data, fetched.picture.suffix
            if writer is None:
                outcome["file"] = f"{file_name(index, url).removesuffix('.jpg')}.{suffix}"
                (folder / f"{outcome['file']}.part").write_bytes(data)
                (folder / f"{outcome['file']}.part").replace(folder / outcome["file"])
            else:
                outcome["file"] = f"{outcome['key']}.{suffix}"
                about = {"url": url, "captions": captions[index], **{k: outcome[k] for k in _ABOUT}}
                outcome["offset"] = writer.add(outcome["key"], data, suffix, captions[index], about)
                end = writer.end
        write_all(
            journal, (json.dumps({**outcome, "end": end}, ensure_ascii=False) + "\n").encode()
        )


_ABOUT = ("key", "sha256", "width", "height")  # what a sample's .json repeats of the manifest


def _outcome(index: int, fetched: FetchResult) -> dict[str, Any]:
    outcome: dict[str, Any] = dict.fromkeys(MANIFEST.names[len(_ROW) :]) | {
        "index": index,
        "key": f"{index:09d}",
    }
    outcome |= {
        "status": "failed",
        "error": fetched.kind,
        "detail": fetched.detail,
        "http": fetched.http,
    }
    outcome |= {
        "bytes": fetched.received,
        "seconds": round(fetched.seconds, 3),
        "at": round(time.time(), 2),
    }
    if picture := fetched.picture:
        outcome |= {"status": "ok", "error": None, "width": picture.width, "height": picture.height}
        outcome |= {"sha256": hashlib.sha256(picture.data).hexdigest(), "length": len(picture.data)}
    return outcome


# ---- all shards


def download(
    source: str,
    output: str,
    options: FetchOptions,
    *,
    columns: Columns = Columns(),  # noqa: B008 - immutable
    files: bool = False,
    shard_size: int = 10_000,
    limit: int = 0,
    retry: tuple[str, ...] = (),
    engine: str = "local",
    workers: int = 0,
    shards: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Fetch every URL of `source` into `output`; goes on where it was stopped. Returns the report.

    Args:
        files: a folder of pictures and `records.json` instead of shards and `records.jsonl`.
        limit: only the first so many rows; 0 means all.
        retry: kinds of failures that are tried again (`timeout`, `5xx`, `all`).
        shards: `i/n`, only this slice; then `merge_manifests` makes the report.

    Raises:
        ValueError: for a source without URLs, settings other than those the output was begun with, a shard
            that failed every attempt, or when the first `FAIL_FAST_AFTER` rows all fail the same way.
    """
    if min(options.concurrency, options.per_host, shard_size) < 1 or limit < 0:
        raise ValueError(
            "--concurrency, --per-host and --shard-size must be at least 1, --limit not below 0"
        )
    if unknown := [
        kind
        for kind in retry
        if kind not in KINDS and not re.fullmatch(r"all|(http_)?\d{3}|\dxx", kind)
    ]:
        raise ValueError(
            f"--retry {','.join(unknown)}: failures are called 404, 5xx, {', '.join(KINDS)}; or say all"
        )
    store = Store(output)
    if files and not store.local:
        raise ValueError(
            f"{output}: plain files need a local folder; shards can be written anywhere"
        )
    settings = {"source": source, "files": files, "shard_size": shard_size, "limit": limit}
    settings["resize"], settings["bytes"] = (
        options.resize,
        Path(source).stat().st_size if Path(source).is_file() else 0,
    )
    known = store.settings()
    if known and (
        other := {key: value for key, value in settings.items() if known.get(key) != value}
    ):
        was = {key: known.get(key) for key in other}
        raise ValueError(
            f"{output} was begun with {was}, not {other}; use that, or another --output"
        )
    if not known or not _planned(store, parse_slice(shards, known["shards"])):
        known = plan_shards(source, columns, store, settings, shards)
    if files:
        Path(store.root, "images").mkdir(exist_ok=True)
    numbers = parse_slice(shards, known["shards"])
    specs = [ShardSpec(number, output, files, retry, options) for number in numbers]
    old = {int(name.removesuffix(".parquet")) for name in store.manifests()}
    watch, failed = Progress(store.work, numbers, old, 0 if shards else known["rows"], progress), []
    for done in run_tasks(
        fetch_shard, specs, engine=engine, workers=workers, per_cpu=2, tick=watch.tick
    ):
        if done.result is None:
            failed.append(f"shard {done.spec.number:05d}: {done.error}")
        else:
            watch.finished(done.spec.number, done.result)
    watch.show("\n")
    if failed:
        some = "\n".join(failed[:20])
        raise ValueError(
            f"{len(failed)} of {len(specs)} shards failed; the same command goes on:\n{some}"
        )
    return {"outcomes": dict(watch.total())} if shards else merge_manifests(output)


def _planned(store: Store, numbers: range) -> bool:
    finished = set(store.manifests())
    plans = {f"{path.stem}.parquet" for path in store.work.glob("*.plan")}
    return all(f"{number:05d}.parquet" in finished | plans for number in numbers)


def plan_shards(
    source: str, columns: Columns, store: Store, settings: dict[str, Any], shards: str
) -> dict[str, Any]:
    """Cut the source into shards, a file of JSON lines (index, url, captions) each; returns `download.json`."""
    odd, number, total = ParseIssues(), 0, 0
    finished = set(store.manifests())
    rows = group_captions(lambda notes: read_source(source, notes, columns), odd)
    planned = (
        {"index": index, "url": row.url, "captions": row.captions} for index, row in enumerate(rows)
    )
    first = islice(planned, settings["limit"] or None)
    while chunk := list(islice(first, settings["shard_size"])):
        if not number and not any(row["url"] for row in chunk):
            raise ValueError(f"{source}: no URL in the first {len(chunk)} rows")
        path = store.work / f"{number:05d}.plan"
        if number in parse_slice(shards, number + 1) and f"{number:05d}.parquet" not in finished:
            path.with_suffix(".new").write_text("".join(f"{json.dumps(row)}\n" for row in chunk))
            path.with_suffix(".new").replace(path)
        number, total = number + 1, total + len(chunk)
    if not total:
        raise ValueError(f"{source}: no rows")
    known = {**settings, "rows": total, "shards": number, "oddities": odd.lines()}
    written = (
        store.work / f"download.json.part{uuid.uuid4().hex}"
    )  # the jobs of an array may plan at one moment
    written.write_text(json.dumps(known, indent=1, ensure_ascii=False))
    store.publish(written)
    return known


def merge_manifests(output: str) -> dict[str, Any]:
    """From the shards' manifests: `manifest.parquet`, the records, and the report in JSON and HTML.

    The records are `records.jsonl` for shards, `records.json` (the tutorial's form) for plain files.
    """
    fs, root = fsspec.core.url_to_fs(output)
    store = Store(output) if fs.exists(root) else None  # which would make the folder
    if not store or not (known := store.settings()) or not (names := store.manifests()):
        raise ValueError(f"{output}: no finished shard (00000.parquet) of `llava download` is here")
    work = store.work
    records = work / ("records.json" if known["files"] else "records.jsonl")
    merged = work / "manifest.parquet"
    with (
        RecordWriter(records) as writer,
        pq.ParquetWriter(merged, MANIFEST, compression="zstd") as whole,
    ):
        for name in names:
            table = store.read_manifest(name)
            whole.write_table(table)
            for row in table.select(["key", "file", "captions", "status"]).to_pylist():
                if row["status"] == "ok" and row["captions"]:
                    place = f"{name.removesuffix('.parquet')}.tar#{row['key']}"
                    image = f"images/{row['file']}" if known["files"] else place
                    writer.write(make_record(image, INSTRUCTION, row["captions"]))
    report = write_download_report(merged, known, work / "report.json", work / "report.html")
    if len(names) < known["shards"]:
        report["missing_shards"] = known["shards"] - len(names)
    for path in (records, merged, work / "report.json", work / "report.html"):
        store.publish(path)
    return report


class Progress:
    """Reads the journals as they grow, wherever their writers run: the live line, and the early stop."""

    def __init__(self, work: Path, numbers: range, old: set[int], rows: int, shown: bool) -> None:
        self._work, self._numbers, self._old, self._rows, self._shown = (
            work,
            numbers,
            old,
            rows,
            shown,
        )
        self._read: Counter[Path] = Counter()
        self._counts: dict[int, Counter[str]] = {}
        self._take()
        self._before, self._start = self.total(), time.monotonic()

    def _take(self) -> None:
        for path in self._work.glob("*.journal"):
            if int(path.stem) not in self._numbers:  # another job's
                continue
            try:
                with path.open("rb") as file:
                    file.seek(self._read[path])
                    data = file.read()
            except FileNotFoundError:  # finished just now
                continue
            data = data[: data.rfind(b"\n") + 1]
            self._read[path] += len(data)
            rows = (json.loads(line) for line in data.splitlines())
            new = Counter(row["error"] or "ok" for row in rows if row["index"] >= 0)
            self._counts.setdefault(int(path.stem), Counter()).update(new)

    def tick(self) -> None:
        """Take in what the journals have gained."""
        self._take()
        now = self.total() - self._before
        if len(now) == 1 and now.total() >= FAIL_FAST_AFTER and "ok" not in now:
            (kind, count), *_ = now.items()
            advice = _ADVICE.get(
                kind, "what they have in common is in the journals, in the work folder"
            )
            raise ValueError(f"stopped: the first {count} rows all failed with '{kind}': {advice}")
        self.show()

    def finished(self, number: int, outcomes: dict[str, int]) -> None:
        """A shard's own count replaces what its journal has said; `old` ones were finished before this run."""
        self._counts[number] = Counter(outcomes)
        if number in self._old:
            self._before += self._counts[number]

    def total(self) -> Counter[str]:
        """Rows by outcome, so far."""
        return sum(self._counts.values(), Counter())

    def show(self, end: str = "") -> None:
        """Write the line."""
        if not self._shown:
            return
        total = self.total()
        done, seconds = total.total(), time.monotonic() - self._start
        rate = (done - self._before.total()) / max(seconds, 1e-9)
        left = int((self._rows - done) / rate) if self._rows > done and rate > 0 else 0
        eta = f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left" if left else ""
        of = f" of {self._rows:,}" if self._rows else ""
        counts = f"{total['ok']:,} good, {done - total['ok']:,} bad"
        sys.stderr.write(f"\r{done:,}{of} rows, {rate:,.0f}/s, {counts}{eta}   {end}")
        sys.stderr.flush()


# ---- command line


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "llava download", description="Fetch the pictures of a list of URLs."
    )
    add = parser.add_argument
    add("source", help="TSV (either order), CSV, JSONL, JSON, Parquet, a folder or a glob of them")
    add("--output", required=True, help="a folder, or any fsspec URL")
    add("--output-format", choices=["shards", "files"], default="shards")
    add("--shard-size", type=int, default=10_000, help="rows in a shard (%(default)s)")
    add("--limit", type=int, default=0, help="only the first so many rows")
    add(
        "--retry",
        default="",
        metavar="KINDS",
        help="fetch failures again: timeout,5xx,dns,... or all",
    )
    add(
        "--concurrency",
        type=int,
        default=256,
        help="requests under way for each shard (%(default)s)",
    )
    add(
        "--per-host",
        type=int,
        default=4,
        help="of these, at most so many to one host (%(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=10.0,
        help="seconds for one picture, redirects included (%(default)s)",
    )
    add(
        "--retries",
        type=int,
        default=1,
        help="more tries at once after a reset, 429 or 5xx (%(default)s)",
    )
    add("--max-bytes", type=int, default=20_000_000, help="of a picture (%(default)s)")
    add("--max-pixels", type=int, default=MAX_PIXELS, help="(%(default)s)")
    add("--resize", type=int, default=0, help="shorter side, only shrinking; 0 keeps the bytes")
    add(
        "--user-agent-contact",
        dest="contact",
        default="",
        help="a URL or address, told to the servers",
    )
    add("--robots", action="store_true", help="ask each host's robots.txt")
    add("--allow-private", action="store_true", help="private addresses too: your own mirror")
    for column in Columns._fields:
        add(f"--{column}-column", default="", help=f"name of the column with the {column}")
    add_worker_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """`llava download captions.tsv --output data/cc3m`."""
    args = _parse(argv)
    output = args.output.rstrip("/")
    report = download(
        args.source,
        output,
        FetchOptions(**{field.name: getattr(args, field.name) for field in fields(FetchOptions)}),
        columns=Columns(args.url_column, args.image_column, args.caption_column),
        files=args.output_format == "files",
        retry=tuple(kind for kind in args.retry.split(",") if kind),
        progress=sys.stderr.isatty(),
        **{
            name: getattr(args, name)
            for name in ("shard_size", "limit", "engine", "workers", "shards")
        },
    )
    _tell(report, output)
    if none := not report["outcomes"].get("ok"):
        kind = max(report["outcomes"], key=report["outcomes"].__getitem__)
        print(
            f"not one picture came. {_ADVICE.get(kind, '')} Then ask again with --retry {kind}",
            file=sys.stderr,
        )
    return int(none)


def merge_main(argv: list[str] | None = None) -> int:
    """After the last job of an array: one manifest, the records, the report."""
    parser = argparse.ArgumentParser("llava merge-manifests", description=merge_main.__doc__)
    parser.add_argument("output", help="the --output of the jobs")
    output = parser.parse_args(argv).output.rstrip("/")
    report = merge_manifests(output)
    _tell(report, output)
    return 1 if "missing_shards" in report else 0


def _tell(report: dict[str, Any], output: str) -> None:
    for kind, count in sorted(report["outcomes"].items(), key=lambda item: -item[1]):
        sys.stdout.write(f"{count:>9,} {kind}\n")
    sys.stdout.write(f"{sum(report['outcomes'].values()):>9,} rows -> {output}\n")
    if missing := report.get("missing_shards"):
        sys.stdout.write(f"{missing:>9,} shards are not finished yet\n")
